//! A change that almost never comes and that every connection of a worker must notice.
//!
//! A connection looks for it whenever it is polled, which is with every request. So a look is a comparison of two
//! numbers, and the task that is to be woken is noted once and not with each look.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

use slab::Slab;

/// Something that can change, on one worker.
#[derive(Debug, Default)]
pub struct Signal {
    raised: Cell<u64>,
    waiting: RefCell<Slab<Waker>>,
}

impl Signal {
    /// Tells all who wait for it.
    pub fn raise(&self) {
        self.raised.set(self.raised.get().wrapping_add(1));
        for (_, task) in &*self.waiting.borrow() {
            task.wake_by_ref();
        }
    }

    /// Somebody who looks for it; the first look finds a change.
    #[must_use]
    pub fn subscribe(self: &Rc<Self>) -> Subscription {
        Subscription { signal: Rc::clone(self), seen: None, place: None }
    }
}

/// One who looks for a change.
#[derive(Debug)]
pub struct Subscription {
    signal: Rc<Signal>,
    seen: Option<u64>,
    place: Option<usize>,
}

impl Subscription {
    /// Whether there was a change since the last look. The task is woken at the next one.
    pub fn changed(&mut self, cx: &Context<'_>) -> bool {
        let now = Some(self.signal.raised.get());
        let mut waiting = self.signal.waiting.borrow_mut();
        match self.place.and_then(|place| waiting.get_mut(place)) {
            Some(task) if task.will_wake(cx.waker()) => {}
            Some(task) => task.clone_from(cx.waker()),
            None => self.place = Some(waiting.insert(cx.waker().clone())),
        }
        std::mem::replace(&mut self.seen, now) != now
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            drop(self.signal.waiting.borrow_mut().try_remove(place));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn each_change_is_noticed_once_by_everybody() {
        let signal = Rc::new(Signal::default());
        let (mut a, mut b) = (signal.subscribe(), signal.subscribe());
        let looks = |s: &mut Subscription, cx: &Context<'_>| (s.changed(cx), s.changed(cx));
        poll_fn(|cx| {
            assert_eq!(looks(&mut a, cx), (true, false), "the first look finds a change");
            assert_eq!(looks(&mut b, cx), (true, false));
            signal.raise();
            signal.raise();
            assert_eq!(looks(&mut a, cx), (true, false));
            Poll::Ready(())
        })
        .await;
        drop(a);
        poll_fn(|cx| {
            assert_eq!(looks(&mut b, cx), (true, false), "b looks for itself");
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn who_waits_is_woken() {
        let signal = Rc::new(Signal::default());
        let mut subscription = signal.subscribe();
        poll_fn(|cx| Poll::Ready(subscription.changed(cx))).await;
        let waits = poll_fn(|cx| if subscription.changed(cx) { Poll::Ready(()) } else { Poll::Pending });
        let raises = async {
            tokio::task::yield_now().await;
            signal.raise();
        };
        tokio::join!(waits, raises);
        drop(subscription);
        assert!(signal.waiting.borrow().is_empty());
    }
}
