"""MiniCPM-V 2.6: slices of a picture beneath an overview, each resampled to a fixed number of features."""
