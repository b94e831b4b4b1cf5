"""The Open Inference Protocol v2 for applications on the device, over HTTP, gRPC and a Unix socket."""
