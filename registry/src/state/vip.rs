//! Which index each host has among the automatic virtual addresses.

use std::collections::{BTreeMap, BTreeSet};

use crate::chunks::Chunks;
use crate::model::service::Hostname;

/// Host to index. A new host takes the lowest free one and keeps it while it exists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct VipTable {
    index: Chunks<Hostname, u32>,
    /// Free indexes below `next`.
    free: BTreeSet<u32>,
    next: u32,
}

impl VipTable {
    /// The index of `host`, when it exists.
    pub(super) fn get(&self, host: &str) -> Option<u32> {
        self.index.get(host).copied()
    }

    /// Gives `host` an index if it has none; true when it got one now.
    pub(super) fn allocate(&mut self, host: &str) -> bool {
        if self.index.get(host).is_some() {
            return false;
        }
        let index = self.free.pop_first().unwrap_or_else(|| {
            let index = self.next;
            self.next = self.next.saturating_add(1);
            index
        });
        self.index.insert(host.to_owned(), index);
        true
    }

    /// Frees the index of `host`; true when it had one.
    pub(super) fn release(&mut self, host: &str) -> bool {
        let Some(index) = self.index.remove(host) else { return false };
        self.free.insert(index);
        while let Some(last) = self.next.checked_sub(1).filter(|last| self.free.contains(last)) {
            self.free.remove(&last);
            self.next = last;
        }
        true
    }

    /// Every host and its index, by host.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Hostname, u32)> {
        self.index.iter().map(|(host, index)| (host, *index))
    }

    /// The table with exactly these hosts.
    pub(super) fn restore(index: BTreeMap<Hostname, u32>) -> Self {
        let used: BTreeSet<u32> = index.values().copied().collect();
        let next = used.last().map_or(0, |last| last.saturating_add(1));
        let free = (0..next).filter(|i| !used.contains(i)).collect();
        Self { index: index.into_iter().collect(), free, next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_index_is_taken_and_kept() {
        let mut table = VipTable::default();
        for host in ["a", "b", "c"] {
            assert!(table.allocate(host));
        }
        assert!(!table.allocate("b"), "kept");
        assert_eq!((table.get("a"), table.get("b"), table.get("c")), (Some(0), Some(1), Some(2)));
        assert!(table.release("a"));
        assert!(table.release("b"));
        assert!(!table.release("b"));
        assert!(table.allocate("d"));
        assert_eq!(table.get("d"), Some(0));
        assert_eq!(table.get("c"), Some(2), "others stay");
    }

    #[test]
    fn a_restored_table_equals_the_live_one() {
        let mut table = VipTable::default();
        for host in ["a", "b", "c", "d", "e"] {
            table.allocate(host);
        }
        for host in ["b", "d", "e"] {
            table.release(host);
        }
        let restored = VipTable::restore(table.iter().map(|(h, i)| (h.clone(), i)).collect());
        assert_eq!(restored, table);
    }
}
