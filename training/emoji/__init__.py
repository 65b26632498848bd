"""The embedded model: scenes of colour emoji with captions, autoencoders, teacher, student and scores."""
