"""The network as pure functions of arrays, and where its arrays lie. No files, no family names, no tokenizers."""
