"""Whether two datasets hold the same samples: by their manifests, and sample by sample where those differ."""
