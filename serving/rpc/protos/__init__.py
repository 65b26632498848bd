"""What goes over the wire, generated from the .proto files by `make protos`."""
