"""Costs, forecasts and the order of calls. No tensors."""
