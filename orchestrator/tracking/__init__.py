"""MLflow made of a study's folder."""
