"""The report's page served on this machine while runs go on: read-only, for whom has its token."""
