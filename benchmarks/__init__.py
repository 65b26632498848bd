"""Measurements of servers, over the wire, and of the library in process."""
