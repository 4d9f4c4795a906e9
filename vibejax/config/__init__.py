"""Every stage's configuration: what can be set, its default and its meaning.

A file for each stage, named like its command, and one for each part that several stages have. A
field that the user does not set keeps the default written here, so these modules are the whole list
of what can be configured; `config_file` reads and writes the files.
"""
