//! Consistent hashing: a ring of points, and Maglev tables. Pure.

use xxhash_rust::xxh64::xxh64;

/// A prepared lookup from hash to endpoint index.
#[derive(Debug)]
pub struct Table(Kind);

#[derive(Debug)]
enum Kind {
    Ring(Vec<(u64, u32)>),
    Maglev(Vec<u32>),
}

impl Table {
    /// A ring on which each endpoint owns points in proportion to its weight: the lightest has at least one, and
    /// all together at least `min_size` and about `max_size` at most.
    #[must_use]
    pub fn ring(keys: &[String], weights: &[u32], min_size: usize, max_size: usize) -> Self {
        let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
        let lightest = weights.iter().copied().min().map_or(1, u64::from).max(1);
        // the lightest endpoint's points are a whole number, as in Envoy's ring
        let min_size = u64::try_from(min_size).unwrap_or(u64::MAX);
        let rounds = (lightest * min_size).div_ceil(total.max(1)).max(1);
        let scale_points = rounds * total / lightest;
        let points = scale_points.min(u64::try_from(max_size).unwrap_or(u64::MAX)).max(1);
        let mut ring = Vec::new();
        for (index, (key, weight)) in (0u32..).zip(keys.iter().zip(weights)) {
            let count = (points * u64::from(*weight) / total.max(1)).max(1);
            ring.extend((0..count).map(|n| (xxh64(format!("{key}_{n}").as_bytes(), 0), index)));
        }
        ring.sort_unstable();
        Self(Kind::Ring(ring))
    }

    /// A Maglev table of `size` slots (a prime), filled in turns by weight. Within a turn the order is that of the keys, so
    /// that it does not matter in which order endpoints are told.
    #[must_use]
    pub fn maglev(keys: &[String], weights: &[u32], size: usize) -> Self {
        let size = size.max(3);
        let total: f64 = weights.iter().copied().map(f64::from).sum();
        let heaviest = f64::from(weights.iter().copied().max().unwrap_or(1).max(1)) / total;
        let mut hosts: Vec<(&String, u32, Filler)> = (0u32..)
            .zip(keys.iter().zip(weights))
            .map(|(index, (key, weight))| (key, index, Filler::new(key, f64::from(*weight) / total, size)))
            .collect();
        hosts.sort_unstable_by_key(|(key, index, _)| (*key, *index));
        let mut slots = vec![u32::MAX; size];
        let mut filled = 0;
        let mut turn = 0.0;
        while filled < size && !hosts.is_empty() {
            turn += 1.0;
            for (_, index, host) in &mut hosts {
                if filled < size && host.due(turn, heaviest) {
                    host.claim(&mut slots, *index);
                    filled += 1;
                }
            }
        }
        Self(Kind::Maglev(if filled == size { slots } else { Vec::new() }))
    }

    /// The endpoint that owns `hash`.
    #[must_use]
    pub fn lookup(&self, hash: u64) -> Option<usize> {
        let index = match &self.0 {
            Kind::Ring(ring) => {
                let at = ring.partition_point(|(point, _)| *point < hash);
                ring.get(at).or_else(|| ring.first()).map(|(_, index)| *index)?
            }
            Kind::Maglev(slots) => {
                let size = u64::try_from(slots.len()).ok().filter(|n| *n > 0)?;
                *slots.get(usize::try_from(hash % size).ok()?)?
            }
        };
        usize::try_from(index).ok()
    }
}

/// One endpoint's walk over the slots of a Maglev table.
struct Filler {
    offset: usize,
    skip: usize,
    next: usize,
    weight: f64,
    target: f64,
}

impl Filler {
    fn new(key: &str, weight: f64, size: usize) -> Self {
        let fold = |hash: u64, modulus: usize| {
            let modulus = u64::try_from(modulus).unwrap_or(u64::MAX).max(1);
            usize::try_from(hash % modulus).unwrap_or(0)
        };
        let offset = fold(xxh64(key.as_bytes(), 0), size);
        let skip = fold(xxh64(key.as_bytes(), 1), size - 1) + 1;
        Self { offset, skip, next: 0, weight, target: 0.0 }
    }

    /// The heaviest has every turn, one of half its weight every other.
    fn due(&mut self, turn: f64, heaviest: f64) -> bool {
        if turn * self.weight < self.target {
            return false;
        }
        self.target += heaviest;
        true
    }

    fn claim(&mut self, slots: &mut [u32], index: u32) {
        let size = slots.len();
        for _ in 0..size {
            let at = (self.offset + self.skip.wrapping_mul(self.next)) % size;
            self.next += 1;
            if let Some(slot) = slots.get_mut(at).filter(|s| **s == u32::MAX) {
                *slot = index;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("10.0.0.{i}:80")).collect()
    }

    /// How many of 10,000 hashes move when the last of ten endpoints goes away.
    fn moved(build: impl Fn(&[String], &[u32]) -> Table) -> usize {
        let (all, fewer) = (build(&keys(10), &[1; 10]), build(&keys(9), &[1; 9]));
        let mut rng = fastrand::Rng::with_seed(3);
        (0..10_000)
            .filter(|_| {
                let h = rng.u64(..);
                all.lookup(h) != Some(9) && all.lookup(h) != fewer.lookup(h)
            })
            .count()
    }

    #[test]
    fn few_hashes_move_when_an_endpoint_leaves() {
        assert!(moved(|k, w| Table::ring(k, w, 1024, 8192)) < 1000);
        assert!(moved(|k, w| Table::maglev(k, w, 65537)) < 500);
    }

    #[test]
    fn the_order_of_endpoints_does_not_matter() {
        let (keys, weights) = (keys(7), [3, 1, 4, 1, 5, 9, 2]);
        let back: (Vec<String>, Vec<u32>) = keys.iter().cloned().zip(weights).rev().unzip();
        let (one, other) = (Table::maglev(&keys, &weights, 251), Table::maglev(&back.0, &back.1, 251));
        for hash in 0..251 {
            assert_eq!(one.lookup(hash).map(|i| &keys[i]), other.lookup(hash).map(|i| &back.0[i]), "{hash}");
        }
    }

    #[test]
    fn an_empty_table_owns_nothing() {
        assert_eq!(Table::ring(&[], &[], 1024, 8192).lookup(1), None);
        assert_eq!(Table::maglev(&[], &[], 65537).lookup(1), None);
    }
}
