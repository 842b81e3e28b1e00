"""The way to a server: `base` is the interface, `grpc` a network, `local` the same process."""
