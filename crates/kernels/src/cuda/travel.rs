//! Rows and choices that an exchange moves through the host: copied when somebody looks, and back when the device
//! needs them.

use super::driver::{CudaError, Driver};
use super::gate::Route;
use super::tensor::Tensor;
use crate::level::Dtype;
use crate::staged::{RouteOnHost, WireOnHost};
use std::cell::{Cell, OnceCell};
use std::sync::Arc;

/// Rows as they travel.
pub struct WireOnDevice {
    pub(super) tensor: Tensor,
    /// The same on the host, once looked at.
    host: OnceCell<Vec<u8>>,
    /// Memory of an earlier `host`.
    spare: Cell<Vec<u8>>,
    /// The host's are newer.
    is_filled: bool,
}

impl WireOnDevice {
    pub(super) fn new(driver: &Arc<Driver>, dtype: Dtype) -> Result<Self, CudaError> {
        let tensor = Tensor::new(driver, dtype, (0, 0))?;
        Ok(Self { tensor, host: OnceCell::new(), spare: Cell::default(), is_filled: false })
    }

    /// Has room for so many rows of so many columns.
    pub(super) fn reserve(&mut self, (rows, columns): (usize, usize)) -> Result<(), CudaError> {
        let bytes = rows * columns * self.tensor.dtype().bytes();
        self.tensor.reserve_bytes(bytes)
    }

    /// The tensor, to be overwritten by the device.
    pub(super) fn overwritten(&mut self, columns: usize) -> &mut Tensor {
        self.in_place();
        self.tensor.become_of(self.tensor.dtype(), columns);
        &mut self.tensor
    }

    /// The rows that the device made last, to be overwritten one by one.
    pub(super) fn in_place(&mut self) -> &mut Tensor {
        if let Some(host) = self.host.take() {
            self.spare.set(host);
        }
        self.is_filled = false;
        &mut self.tensor
    }

    /// The tensor with what the host has put there: as many rows as the device had made before.
    ///
    /// # Panics
    ///
    /// If the host has put another number of bytes there.
    pub(super) fn on_device(&self) -> Result<&Tensor, CudaError> {
        if let Some(host) = self.host.get().filter(|_| self.is_filled) {
            let Self { tensor, .. } = self;
            assert_eq!(
                host.len(),
                tensor.rows() * tensor.columns() * tensor.dtype().bytes(),
                "as many rows"
            );
            tensor.buffer().fill(0, host)?;
        }
        Ok(&self.tensor)
    }
}

impl WireOnHost for WireOnDevice {
    fn bytes(&self) -> &[u8] {
        self.host.get_or_init(|| {
            let mut bytes = self.spare.take();
            bytes.resize(
                self.tensor.rows() * self.tensor.columns() * self.tensor.dtype().bytes(),
                0,
            );
            if let Err(error) = self.tensor.buffer().read(&mut bytes) {
                self.tensor.driver().fail(error);
            }
            bytes
        })
    }

    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let mut host = self.host.take().unwrap_or_else(|| self.spare.take());
        host.resize(bytes, 0);
        self.is_filled = true;
        let _empty = self.host.set(host);
        self.host.get_mut().expect("just set")
    }
}

/// Chosen expert and score of every row.
pub struct RouteOnDevice {
    pub(super) route: Route,
    driver: Arc<Driver>,
    host: OnceCell<Vec<u16>>,
}

impl RouteOnDevice {
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let (route, driver) = (Route::new(driver)?, Arc::clone(driver));
        Ok(Self { route, driver, host: OnceCell::new() })
    }

    /// The route, to be overwritten by the device.
    pub(super) fn overwritten(&mut self) -> &mut Route {
        self.host.take();
        &mut self.route
    }
}

impl RouteOnHost for RouteOnDevice {
    fn experts(&self) -> &[u16] {
        self.host.get_or_init(|| {
            self.route.experts_to_host().unwrap_or_else(|error| {
                self.driver.fail(error);
                vec![0; self.route.rows()]
            })
        })
    }
}
