"""From gRPC to a backend: who asks, how much, for what; and back, as events or as an error that says what to do."""
