"""What every stage shares, without torch: errors, types, files, sizes, configuration."""
