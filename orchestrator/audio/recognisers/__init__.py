"""Speech recogniser plugins: from sound to words."""
