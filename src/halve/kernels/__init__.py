"""The only room that knows which code runs: kernels as rows of tables, behind one `Ops` interface."""
