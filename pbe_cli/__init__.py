"""The console command `pbe`: one name for all programs of both wings, and a demonstration that runs them one after the other."""
