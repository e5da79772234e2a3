//! A sorted map that is cheap to copy: copies share all entries, and all chunks but the one that changes.

use std::borrow::Borrow;
use std::sync::Arc;

/// Entries per chunk at most; a fuller one is split in two.
const CHUNK: usize = 128;

type Chunk<K, V> = Arc<Vec<Arc<(K, V)>>>;

/// A sorted, immutable-when-shared map. A change copies one chunk of at most [`CHUNK`] pointers and the list of chunks.
#[derive(Debug, Clone)]
pub struct Chunks<K, V> {
    /// Never contains an empty chunk.
    chunks: Arc<Vec<Chunk<K, V>>>,
    len: usize,
}

impl<K, V> Default for Chunks<K, V> {
    fn default() -> Self {
        Self { chunks: Arc::default(), len: 0 }
    }
}

impl<K: Ord, V: Clone> Chunks<K, V> {
    /// How many entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry with the lowest key.
    #[must_use]
    pub fn first(&self) -> Option<(&K, &V)> {
        self.chunks.first()?.first().map(|entry| (&entry.0, &entry.1))
    }

    /// The entry with the highest key.
    #[must_use]
    pub fn last(&self) -> Option<(&K, &V)> {
        self.chunks.last()?.last().map(|entry| (&entry.0, &entry.1))
    }

    /// Removes the entry with the lowest key; gives its value.
    pub fn pop_first(&mut self) -> Option<V> {
        let chunks = Arc::make_mut(&mut self.chunks);
        let entries = Arc::make_mut(chunks.first_mut()?);
        let value = entries.remove(0).1.clone();
        if entries.is_empty() {
            chunks.remove(0);
        }
        self.len -= 1;
        Some(value)
    }

    /// The chunk that holds `key`, or would.
    fn chunk_of<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        let after = self.chunks.partition_point(|c| c.first().is_some_and(|entry| entry.0.borrow() <= key));
        after.saturating_sub(1)
    }

    /// The value of `key`.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let chunk = self.chunks.get(self.chunk_of(key))?;
        let at = chunk.binary_search_by(|entry| entry.0.borrow().cmp(key)).ok()?;
        chunk.get(at).map(|entry| &entry.1)
    }

    /// Sets the value of `key`.
    pub fn insert(&mut self, key: K, value: V) {
        let at = self.chunk_of(&key);
        let chunks = Arc::make_mut(&mut self.chunks);
        let Some(chunk) = chunks.get_mut(at) else {
            chunks.push(Arc::new(vec![Arc::new((key, value))]));
            self.len += 1;
            return;
        };
        let entries = Arc::make_mut(chunk);
        match entries.binary_search_by(|entry| entry.0.cmp(&key)) {
            Ok(found) => {
                if let Some(entry) = entries.get_mut(found) {
                    *entry = Arc::new((key, value));
                }
            }
            Err(place) => {
                entries.insert(place, Arc::new((key, value)));
                self.len += 1;
                if entries.len() > CHUNK {
                    let tail = entries.split_off(CHUNK / 2);
                    chunks.insert(at + 1, Arc::new(tail));
                }
            }
        }
    }

    /// Removes `key`.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let at = self.chunk_of(key);
        let found = self.chunks.get(at)?.binary_search_by(|entry| entry.0.borrow().cmp(key)).ok()?;
        let chunks = Arc::make_mut(&mut self.chunks);
        let entries = Arc::make_mut(chunks.get_mut(at)?);
        let value = entries.remove(found).1.clone();
        if entries.is_empty() {
            chunks.remove(at);
        }
        self.len -= 1;
        Some(value)
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All entries in the order of their keys.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|entry| (&entry.0, &entry.1))
    }

    /// The entries from `start` on, in the order of their keys.
    pub fn iter_from<'a, Q: Ord + ?Sized>(
        &'a self,
        start: &Q,
    ) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V, Q>
    where
        K: Borrow<Q>,
    {
        let at = self.chunk_of(start);
        let skip = self.chunks.get(at).map_or(0, |c| c.partition_point(|entry| entry.0.borrow() < start));
        self.chunks
            .iter()
            .skip(at)
            .flat_map(|chunk| chunk.iter())
            .skip(skip)
            .map(|entry| (&entry.0, &entry.1))
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for Chunks<K, V> {
    /// The same entries, however they lie in chunks.
    fn eq(&self, other: &Self) -> bool {
        let [ours, theirs] = [self, other].map(|map| map.chunks.iter().flat_map(|chunk| chunk.iter()));
        ours.eq(theirs)
    }
}

impl<K: Eq, V: Eq> Eq for Chunks<K, V> {}

impl<K: Ord, V: Clone> FromIterator<(K, V)> for Chunks<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_btree_map(ops in proptest::collection::vec((0u8..8, 0u16..400, any::<u8>()), 0..1500)) {
            let mut chunks = Chunks::default();
            let mut model = BTreeMap::new();
            let mut before = (chunks.clone(), model.clone());
            for (i, (kind, key, value)) in ops.into_iter().enumerate() {
                if i == 700 {
                    before = (chunks.clone(), model.clone());
                }
                match kind {
                    0..4 => {
                        chunks.insert(key, value);
                        model.insert(key, value);
                    }
                    4 => prop_assert_eq!(chunks.pop_first(), model.pop_first().map(|(_, value)| value)),
                    _ => prop_assert_eq!(chunks.remove(&key), model.remove(&key)),
                }
            }
            for (chunks, model) in [&before, &(chunks, model)] {
                prop_assert_eq!(chunks.len(), model.len());
                prop_assert!(chunks.iter().eq(model.iter()) && chunks.iter().rev().eq(model.iter().rev()));
                prop_assert_eq!((chunks.first(), chunks.last()), (model.first_key_value(), model.last_key_value()));
                for key in [0u16, 17, 200, 399] {
                    prop_assert_eq!(chunks.get(&key), model.get(&key));
                    prop_assert!(chunks.iter_from(&key).eq(model.range(key..)));
                }
            }
        }
    }
}
