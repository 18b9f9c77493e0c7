//! Work on as many threads as there are processors.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// More threads than this gain nothing: the image is put together by one.
const MOST: usize = 8;

/// Does `one` for every item; the answers in the order of the items. Each thread has a scratch of its own.
pub(super) fn in_parallel<T: Sync, S, R: Send>(
    items: &[T],
    scratch: impl Fn() -> S + Sync,
    one: impl Fn(&T, &mut S) -> R + Sync,
) -> Vec<R> {
    let threads = threads(items.len());
    if threads <= 1 {
        let mut scratch = scratch();
        return items.iter().map(|item| one(item, &mut scratch)).collect();
    }
    let next = AtomicUsize::new(0);
    let share = || {
        let mut scratch = scratch();
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(number) else { return done };
            done.push((number, one(item, &mut scratch)));
        }
    };
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let running: Vec<_> = (1..threads).map(|_| scope.spawn(share)).collect();
        let mut done = share();
        for thread in running {
            match thread.join() {
                Ok(share) => done.extend(share),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|&(number, _)| number);
    done.into_iter().map(|(_, answer)| answer).collect()
}

/// Does `one` for every item on other threads and hands the answers to `take` in the order of the items, at most `ahead`
/// of which are done before their turn. Ends early when `take` answers false.
pub(super) fn in_order<T: Sync, S, R: Send>(
    items: &[T],
    ahead: usize,
    scratch: impl Fn() -> S + Sync,
    one: impl Fn(&T, &mut S) -> R + Sync,
    mut take: impl FnMut(&T, R) -> bool,
) {
    let threads = threads(items.len());
    if threads <= 1 {
        let mut scratch = scratch();
        let _ = items.iter().all(|item| take(item, one(item, &mut scratch)));
        return;
    }
    let queue = Mutex::new(Queue { next: 0, taken: 0, stop: false, done: BTreeMap::new() });
    let changed = Condvar::new();
    // Whoever leaves by a panic lets the others go.
    let leave = || {
        lock(&queue).stop = true;
        changed.notify_all();
    };
    let work = || {
        let leave = Leaving(&leave);
        let mut scratch = scratch();
        loop {
            let mut state = lock(&queue);
            while !state.stop && state.next < items.len() && state.next >= state.taken + ahead {
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stop || state.next >= items.len() {
                drop(state);
                std::mem::forget(leave);
                return;
            }
            let number = state.next;
            state.next += 1;
            drop(state);
            let answer = one(&items[number], &mut scratch);
            lock(&queue).done.insert(number, answer);
            changed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        (0..threads).for_each(|_| _ = scope.spawn(work));
        let _leave = Leaving(&leave);
        for (number, item) in items.iter().enumerate() {
            let mut state = lock(&queue);
            let answer = loop {
                if let Some(answer) = state.done.remove(&number) {
                    break answer;
                }
                if state.stop {
                    return;
                }
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            state.taken = number + 1;
            drop(state);
            changed.notify_all();
            if !take(item, answer) {
                return;
            }
        }
    });
}

/// Answers that wait for their turn.
struct Queue<R> {
    /// The next item nobody works at.
    next: usize,
    /// Answers handed on.
    taken: usize,
    stop: bool,
    done: BTreeMap<usize, R>,
}

/// Nothing that panics holds the lock, so that the queue is sound even then.
fn lock<R>(queue: &Mutex<Queue<R>>) -> MutexGuard<'_, Queue<R>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls its function when it goes.
struct Leaving<F: Fn()>(F);

impl<F: Fn()> Drop for Leaving<F> {
    fn drop(&mut self) {
        self.0();
    }
}

fn threads(items: usize) -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST).min(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_items_whoever_is_done_first() {
        let items: Vec<usize> = (0..200).collect();
        let slow = |&item: &usize, _: &mut ()| {
            if item % 7 == 0 {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            item * 2
        };
        assert_eq!(in_parallel(&items, || (), slow), items.iter().map(|i| i * 2).collect::<Vec<_>>());
        let mut answers = Vec::new();
        in_order(
            &items,
            3,
            || (),
            slow,
            |&item, answer| {
                answers.push(answer);
                item < 150
            },
        );
        assert_eq!(answers, (0..=150).map(|i| i * 2).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_in_one_thread_ends_them_all_and_is_passed_on() {
        let items: Vec<usize> = (0..200).collect();
        let run = || {
            let one = |&item: &usize, _: &mut ()| assert!(item != 77, "on purpose");
            in_order(&items, 3, || (), one, |_, ()| true);
        };
        assert!(std::panic::catch_unwind(run).is_err());
    }
}
