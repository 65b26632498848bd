"""Folders of stock diffusers pipelines, and the recipe that each of them implies."""
