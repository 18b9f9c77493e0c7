//! Which answer belongs to which question.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use tokio::sync::oneshot;

use super::shared::{Order, Shared};
use crate::answers::lint::Surroundings;
use crate::api::server::Answer;
use crate::api::{Failure, Request};
use crate::{answers, explain, flows, observe};

/// Answers from what is shared; orders go to the main task.
pub struct Answers(pub Arc<Shared>);

impl Answer for Answers {
    async fn answer(&self, request: Request) -> Result<Value, Failure> {
        match request {
            Request::Apply { file } => {
                let file = PathBuf::from(file);
                if !file.is_absolute() {
                    return Err(Failure::input("the path of the policy must be absolute"));
                }
                let (done, outcome) = oneshot::channel();
                self.order(Order::Apply { file, done }).await?;
                to_value(&outcome.await.map_err(|_| ending())??)
            }
            Request::Plan { file } => {
                let file = PathBuf::from(file);
                if !file.is_absolute() {
                    return Err(Failure::input("the path of the policy must be absolute"));
                }
                let (done, outcome) = oneshot::channel();
                self.order(Order::Plan { file, done }).await?;
                to_value(&outcome.await.map_err(|_| ending())??)
            }
            Request::Stop => {
                let (done, stopped) = oneshot::channel();
                self.order(Order::Stop { done }).await?;
                stopped.await.map_err(|_| ending())?;
                to_value(&serde_json::json!({ "pid": std::process::id() }))
            }
            // Reading a million flows takes tens of milliseconds: not on the threads that serve everyone.
            question => {
                let shared = Arc::clone(&self.0);
                tokio::task::spawn_blocking(move || look(&shared, question))
                    .await
                    .map_err(|error| Failure::failed(&anyhow::anyhow!("a bug, please report it: {error}")))?
            }
        }
    }
}

impl Answers {
    async fn order(&self, order: Order) -> Result<(), Failure> {
        self.0.orders.send(order).await.map_err(|_| ending())
    }
}

fn ending() -> Failure {
    Failure::failed(&anyhow::anyhow!("the daemon is ending"))
}

fn look(shared: &Shared, question: Request) -> Result<Value, Failure> {
    match question {
        Request::Status => to_value(&observe::status(shared)?),
        Request::Flows { guest, limit } => to_value(&flows::list(shared, guest.as_deref(), limit)?),
        Request::KillFlows(selection) => to_value(&flows::kill(shared, &selection)?),
        Request::FlushFlows { guest } => to_value(&flows::flush(shared, guest.as_deref())?),
        Request::Drops { all } => to_value(&observe::drops(shared, all)?),
        Request::Snat { guest, frontend } => {
            to_value(&flows::snat(shared, guest.as_deref(), frontend.as_deref())?)
        }
        Request::SnatDestinations { guest, frontend, limit } => {
            to_value(&flows::by_destination(shared, guest.as_deref(), frontend.as_deref(), limit)?)
        }
        Request::SnatPort { port } => to_value(&flows::port_holders(shared, &port)?),
        Request::Whois { port, at } => {
            to_value(&observe::whois::whois(&shared.options.state_dir, &port, at.as_deref())?)
        }
        Request::Rules { group, shadowed } => to_value(&observe::rules(shared, group.as_deref(), shadowed)?),
        Request::Explain(question) => to_value(&explain::explain(shared, &question)?),
        Request::Effective { .. }
        | Request::Verify(_)
        | Request::Diagnose(_)
        | Request::Lint
        | Request::Tags { .. } => {
            let in_force = shared.in_force();
            let around = Surroundings { host_addresses: Some(&in_force.facts.addresses) };
            answers::answer(&in_force.loaded.network, &in_force.loaded.places, around, &question)
        }
        Request::Apply { .. } | Request::Plan { .. } | Request::Stop => Err(Failure::input("not a question")),
    }
}

fn to_value(answer: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(answer)
        .map_err(|error| Failure::failed(&anyhow::Error::new(error).context("writing JSON")))
}
