"""MiniCPM-V 2.6: slices of a picture beneath an overview, each resampled to as many features; frames of videos."""
