"""The claims of the papers on Kac flows, measured on trained networks. There is one module per claim.

The modules have pure functions of tensors and networks. Quality is measured on delivered images. Velocities and
energies are measured on the network's own output.
"""
