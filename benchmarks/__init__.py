"""What Sluice costs beside its peers. Nothing outside this folder imports it."""
