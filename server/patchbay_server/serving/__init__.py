"""How hosted models are offered: in this process, by a plain gRPC server, or as Ray Serve applications."""
