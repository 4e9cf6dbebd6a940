//! What the tests of this engine share. Each test program uses a part of it.
#![allow(dead_code)]

pub mod case;
pub mod encodings;
pub mod features;
pub mod generate;
pub mod guest;
pub mod host_cpu;
pub mod model;
pub mod random;
