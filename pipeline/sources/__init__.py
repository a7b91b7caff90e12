"""Where prompts and pairs of responses come from: files, folders and data sets of others."""
