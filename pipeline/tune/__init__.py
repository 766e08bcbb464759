"""Settings of a model tried on a sample: how fast each is, and how far its labels are from those in fp32."""
