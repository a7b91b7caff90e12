"""Draw samples from a policy: one protocol, a vLLM and a transformers sampler, and the resumable table of samples."""
