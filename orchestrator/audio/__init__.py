"""Audio: log-mel frames, their vocoder, speech recognisers and speaker encoders."""
