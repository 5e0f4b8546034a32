//! CUDA devices: launch the records of a bundle's target on a GPU, through a [`Driver`].

mod driver;

pub use driver::{
    BoundLaunch, DeviceAddress, Driver, DriverError, GpuFacts, GraphHandle, KernelHandle,
    KernelImage, Ticket,
};
