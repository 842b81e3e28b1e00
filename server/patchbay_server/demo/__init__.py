"""``make demo``: the real service, the demo as a separate client process over gRPC, and nothing left behind.

    __main__.py   flags
    launcher.py   start the service, wait with a progress line, run examples/demo.py, stop everything
    processes.py  child processes that cannot outlive the program, whatever ends it

The experiments themselves are examples/demo.py, which knows nothing of this package: an address and a key are all it
gets.
"""
