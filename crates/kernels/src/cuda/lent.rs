//! Rows in device memory that ranks of one process lend each other.
//!
//! All of them enqueue on one stream, so whoever enqueues later needs to wait for no kernel: it suffices that the host's
//! threads agree on the order. Experts read rows where these are and leave the results in their place. Whoever has lent
//! rows may fail and go on while another rank still holds them: it then gets other memory for its next ones
//! ([`Tensor::resize`]), and this is freed behind the kernels of whoever held it last.

use super::args::blocks;
use super::buffer::Buffer;
use super::dispatch::{RouteTable, Source};
use super::gate::Route;
use super::tensor::Tensor;
use crate::level::Dtype;
use crate::staged::Loan;
use std::sync::Arc;

/// Rows of one rank, and where they go.
#[derive(Clone)]
pub struct LentRows {
    rows: Arc<Buffer>,
    /// u16 per row.
    wanted: Arc<Buffer>,
    routes: Arc<RouteTable>,
    count: usize,
    dtype: Dtype,
    columns: usize,
}

impl LentRows {
    /// # Panics
    ///
    /// If rows and choices do not belong together.
    pub(super) fn new(rows: &Tensor, route: &Route, routes: &Arc<RouteTable>) -> Self {
        assert_eq!(rows.rows(), route.rows(), "a choice per row");
        let count = rows.rows();
        assert!(
            count * rows.columns() * rows.dtype().bytes() <= rows.buffer().bytes(),
            "rows are there"
        );
        assert!(count * size_of::<u16>() <= route.experts().bytes(), "choices are there");
        Self { count, ..Self::none(rows, route, routes) }
    }

    /// None of the rows: of a rank whose device has failed.
    pub(super) fn none(rows: &Tensor, route: &Route, routes: &Arc<RouteTable>) -> Self {
        Self {
            rows: rows.share(),
            wanted: Arc::clone(route.experts()),
            routes: Arc::clone(routes),
            count: 0,
            dtype: rows.dtype(),
            columns: rows.columns(),
        }
    }

    /// As kernels see it that serve a layer.
    ///
    /// # Panics
    ///
    /// If the rows are none of this shape, or know no such layer.
    pub(super) fn source(&self, layer: usize, (dtype, columns): (Dtype, usize)) -> Source {
        assert!(layer < self.routes.layers(), "layer {layer} of {}", self.routes.layers());
        if self.count == 0 {
            return Source::default();
        }
        assert_eq!((self.dtype, self.columns), (dtype, columns), "rows of the experts' shape");
        let rows = self.rows.address();
        Source {
            wanted: self.wanted.address(),
            rows,
            results: rows,
            count: blocks(self.count),
            routes: self.routes.addresses(),
        }
    }
}

impl Loan for LentRows {
    fn rows(&self) -> usize {
        self.count
    }

    fn spoil(&self) {
        let nan = match self.dtype {
            Dtype::F32 => &f32::NAN.to_le_bytes()[..],
            Dtype::Bf16 => &half::bf16::NAN.to_le_bytes()[..],
        };
        if 0 < self.count
            && let Err(error) = self.rows.fill(0, nan)
        {
            self.rows.driver().fail(error);
        }
    }
}
