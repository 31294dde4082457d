"""The ceiling of a gene decoder: it decodes the observed embeddings."""
