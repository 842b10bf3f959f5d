//! How much KV cache a worker keeps.

use crate::backups::RowBytes;
use kernels::{BLOCK_TOKENS, Cache, Dtype, Pool};
use model::config::Config;
use model::forward::{pools, shape};
use placement::KvPools;

/// Capacity of the KV cache of a rank, in blocks of [`BLOCK_TOKENS`] positions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvBlocks {
    pub full: u32,
    pub chunked: u32,
}

/// The memory is too small for even one block per layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{bytes} bytes of KV memory are too few, one sequence needs at least {needed}; give more")]
pub struct KvTooSmall {
    pub bytes: u64,
    pub needed: u64,
}

impl KvBlocks {
    /// As much as `bytes` hold, but no more than `sequences` sequences of full context need.
    ///
    /// If not even one sequence fits, the context that does is what the cluster offers.
    ///
    /// # Errors
    ///
    /// [`KvTooSmall`] if less than a chunk and one more block fit.
    pub fn plan(
        config: &Config,
        dtype: Dtype,
        bytes: u64,
        sequences: u32,
    ) -> Result<Self, KvTooSmall> {
        let heads = shape(config);
        let block = Cache::block_bytes(dtype, heads.kv_heads, heads.head_dim) as u64;
        let (full, chunked): (Vec<Pool>, Vec<Pool>) =
            pools(config).into_iter().partition(|pool| matches!(pool, Pool::Full));
        let (full_bytes, chunked_bytes) = (full.len() as u64 * block, chunked.len() as u64 * block);
        let blocks = |tokens: u32| u64::from(tokens).div_ceil(BLOCK_TOKENS as u64);
        let context = blocks(config.context_tokens);
        // One more than a chunk, so that a step may cross a chunk's border.
        let chunk = chunk_tokens(config).map_or(0, |chunk| blocks(chunk).min(context) + 1);
        let needed = full_bytes + chunk * chunked_bytes;
        if bytes < needed {
            return Err(KvTooSmall { bytes, needed });
        }
        let fit = bytes / (context * full_bytes + chunk * chunked_bytes).max(1);
        let units = fit.min(u64::from(sequences));
        let (full, chunked) = match units {
            // Without a layer of full attention there is one block per context, for the scheduler.
            0 => ((bytes - chunk * chunked_bytes) / full_bytes.max(1), chunk),
            _ => (units * context, units * chunk),
        };
        let count = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
        Ok(Self { full: count(full), chunked: count(chunked) })
    }

    /// Enough for so many sequences of so many tokens.
    #[must_use]
    pub fn holding(config: &Config, sequences: u32, tokens: u32) -> Self {
        let block = u32::try_from(BLOCK_TOKENS).unwrap_or(u32::MAX);
        let blocks = |tokens: u32| tokens.div_ceil(block);
        let full = blocks(tokens);
        // One more than a chunk, so that a step may cross a chunk's border.
        let chunked = chunk_tokens(config).map_or(0, |chunk| full.min(blocks(chunk) + 1));
        Self { full: sequences.saturating_mul(full), chunked: sequences.saturating_mul(chunked) }
    }

    /// What holds either.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { full: self.full.max(other.full), chunked: self.chunked.max(other.chunked) }
    }

    /// Bytes it takes in memory, once all of it is used.
    #[must_use]
    pub fn bytes(self, config: &Config, dtype: Dtype) -> u64 {
        let heads = shape(config);
        let block = Cache::block_bytes(dtype, heads.kv_heads, heads.head_dim) as u64;
        let of = |pool: &Pool| match pool {
            Pool::Full => u64::from(self.full) * block,
            Pool::Chunked(_) => u64::from(self.chunked) * block,
        };
        pools(config).iter().map(of).sum()
    }

    /// What the coordinator and the router need to know of it. Copies of others' rows are beside it.
    #[must_use]
    pub fn pools(self, config: &Config) -> KvPools {
        KvPools {
            backup_tokens: 0,
            block_tokens: u32::try_from(BLOCK_TOKENS).unwrap_or(u32::MAX),
            full_blocks: self.full,
            chunked_blocks: self.chunked,
            chunk_tokens: chunk_tokens(config),
        }
    }
}

/// Bytes that the keys and values of one position take.
#[must_use]
pub(crate) fn row_bytes(config: &Config, dtype: Dtype) -> RowBytes {
    let heads = shape(config);
    let layer = Cache::block_bytes(dtype, heads.kv_heads, heads.head_dim) / BLOCK_TOKENS;
    let layers = pools(config);
    let full = layers.iter().filter(|pool| matches!(pool, Pool::Full)).count();
    RowBytes {
        full: full * layer,
        chunked: (layers.len() - full) * layer,
        chunk_tokens: chunk_tokens(config),
    }
}

/// Positions of a chunk, if any layer is chunked.
fn chunk_tokens(config: &Config) -> Option<u32> {
    config.chunk_tokens.filter(|_| config.chunked.contains(&true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn toy() -> Config {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        Config::load(&root.join("models/toy-maverick")).unwrap()
    }

    #[test]
    fn plan_takes_what_the_sequences_need_and_no_more() {
        let config = toy();
        let ten = KvBlocks::plan(&config, Dtype::Bf16, 1 << 40, 10).unwrap();
        let one = KvBlocks::plan(&config, Dtype::Bf16, 1 << 40, 1).unwrap();
        assert_eq!((ten.full, ten.chunked), (10 * one.full, 10 * one.chunked));
        assert!(config.context_tokens <= one.full * 16);
    }

    #[test]
    fn plan_stays_within_its_memory_and_uses_it() {
        let config = toy();
        for shift in 18..26 {
            let bytes = 1_u64 << shift;
            match KvBlocks::plan(&config, Dtype::F32, bytes, 1 << 20) {
                Ok(kv) => {
                    let used = kv.bytes(&config, Dtype::F32);
                    assert!(used <= bytes && bytes / 4 < used, "{used} of {bytes}");
                }
                Err(error) => assert!(bytes < error.needed, "{error}"),
            }
        }
    }

    #[test]
    fn memory_for_nothing_is_refused_with_the_numbers() {
        let error = KvBlocks::plan(&toy(), Dtype::F32, 100, 1).unwrap_err();
        assert!(error.to_string().starts_with("100 bytes of KV memory are too few"), "{error}");
    }
}
