"""The gRPC layer: services, interceptor, access, limits, validation, and conversion of records to messages."""
