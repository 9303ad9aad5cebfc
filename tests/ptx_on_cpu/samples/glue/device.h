// Stands for a device.h that needs a GPU: the tests replace it.
#error "this device.h is for GPUs"
