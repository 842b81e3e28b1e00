"""Generated code of the wire contract (`make proto` writes it from ``proto/patchbay/v1``); never edited by hand."""
