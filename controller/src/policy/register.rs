//! Where every named part of the policy stands, for the stages after this one.

use super::network::Places;
use super::source::{Source, Span};

/// Collects places by path, such as `loadBalancers/lb/outboundRules/out`.
#[derive(Debug, Default)]
pub struct Register {
    spans: Vec<(String, Span)>,
}

impl Register {
    pub fn add(&mut self, path: &[&str], span: Span) {
        self.spans.push((path.join("/"), span));
    }

    /// File, line and column of every path.
    pub fn places(self, source: &Source) -> Places {
        let place = |span: Span| {
            let at = source.position(span.start);
            (source.name.clone(), at.line, at.column)
        };
        self.spans.into_iter().map(|(path, span)| (path, place(span))).collect()
    }
}
