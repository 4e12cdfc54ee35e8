"""From a folder of designs to a prepared dataset: what the folder holds (`sources`), the inputs, and a part made of each."""
