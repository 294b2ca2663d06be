"""gRPC: the services, the interceptor before them, who may call, how much, what is valid, records to messages."""
