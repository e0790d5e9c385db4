"""A bakery: a second domain, small enough to read in one sitting, that shows what the base alone can carry.

It shares nothing with serving. A machine orders ovens to bake batches of loaves; a policy chooses the loaves; the
world knows how long a batch really takes, and breaks ovens from a seed. The same machine runs in the simulation loop
and in the live loop.
"""
