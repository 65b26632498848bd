"""The embedded model: colour emoji composed into captioned scenes, their autoencoder, teacher and scores."""
