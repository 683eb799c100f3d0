"""The stages of the pipeline, one file each, named as the command, the config section and the folder; pages are made in
`reports`."""
