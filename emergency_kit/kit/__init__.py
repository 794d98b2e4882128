"""The kit: one folder for a USB stick or a web host that answers without a network."""
