"""Words at a shell to one call of the api: parse, call, print. Data to stdout, talk to stderr."""
