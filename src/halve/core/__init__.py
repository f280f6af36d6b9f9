"""Words that every room uses: errors, units, and the records that travel between rooms."""
