//! Work on as many threads as there are processors.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

/// More threads than this gain nothing: the image is put together by one.
const MOST: usize = 8;

/// Does `one` for every item; the answers in the order of the items. Each thread has a scratch of its own.
pub(super) fn in_parallel<T: Sync, S, R: Send>(
    items: &[T],
    scratch: impl Fn() -> S + Sync,
    one: impl Fn(&T, &mut S) -> R + Sync,
) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST).min(items.len());
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
