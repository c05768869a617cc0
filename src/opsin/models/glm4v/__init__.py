"""GLM-4.1V and GLM-4.6V-Flash: pictures at their own resolution, videos with the time behind each of their steps."""
