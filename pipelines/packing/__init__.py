"""A frozen plan -> shards on Ray: samples, latents, tars, commit records, the sealed dataset."""
