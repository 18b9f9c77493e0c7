//! Another policy, or the same on a host that has changed: in force whole or not at all.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::task::block_in_place;

use super::Refusal;
use super::drains::occupied;
use super::gateway::{Gateway, tell};
use super::image::{attach_plan, policy_image};
use super::plan::{self, Plan};
use super::refusals::{names_xdp_on, wants_auto};
use super::shared::InForce;
use crate::hosts::{self, Prepared};
use crate::observe::time::rfc3339;
use crate::policy::Loaded;

/// What putting a policy in force came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    pub file: String,
    pub generation: u32,
    pub applied_at: String,
    pub milliseconds: u64,
    /// Changes made on this host for it.
    pub changes: Vec<String>,
    pub warnings: Vec<String>,
    /// Findings in the file that are no errors, with carets.
    pub findings: String,
}

impl Applied {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = self.findings.clone();
        for warning in &self.warnings {
            text += &format!("warning: {warning}\n");
        }
        for change in &self.changes {
            text += &format!("changed: {change}\n");
        }
        text +=
            &format!("{} is in force: generation {}, {} ms\n", self.file, self.generation, self.milliseconds);
        text
    }
}

impl Gateway {
    /// Puts a policy in force. On an error the one before stays.
    pub async fn apply(&mut self, file: PathBuf, loaded: Arc<Loaded>) -> Result<Applied, Refusal> {
        let began = Instant::now();
        self.probers.prepare(&self.host, &loaded.network).await?;
        let down = self.shared.health.down();
        let view = plan::look(&self.host, &self.journal).await?.with_down(down);
        let mut retries = 0;
        let (plan, prepared) = loop {
            match self.attempt(view.clone(), &loaded).await {
                Ok(done) => break done,
                Err(refusal) => {
                    let before = self.refused.len();
                    if let Refusal::Failed(error) = &refusal
                        && let Some(device) = self.learn_refusal(error, &loaded)
                        && self.refused.len() > before
                        && retries < 64
                    {
                        retries += 1;
                        log::warn!("{device} stays with TC: {error:#}");
                        continue;
                    }
                    return Err(refusal);
                }
            }
        };
        let generation = plan.compiled.generation;
        let wanted = attach_plan(&plan.choices);
        self.attached = wanted.hooks();
        self.ownership = plan.compiled.ownership.clone();
        self.shared.set_registry(plan.registry.clone());
        let Prepared { made, mut warnings, waiting } = prepared;
        let findings = loaded.warnings.render(false);
        let in_force = InForce::new(file.clone(), loaded, plan, warnings.clone(), waiting);
        let applied_at = rfc3339(in_force.applied_at);
        self.shared.set_in_force(in_force);
        self.note_history();
        self.follow_health().await;
        // From here on the policy is in force; what fails now is tidying and is said, not undone.
        if let Err(error) = self.refresh_world().await {
            warnings.push(format!("routes to the world were not brought up to date: {error:#}"));
        }
        match block_in_place(|| self.shared.datapath_mut().detach_stale(&self.attached)) {
            Ok(removed) => removed.iter().for_each(|what| log::info!("detached {what}")),
            Err(error) => warnings.push(format!("devices that left the policy: {error:#}")),
        }
        let in_force = self.shared.in_force();
        let reserved = hosts::Ranges::new(in_force.compiled.reserved_ports.iter().copied());
        let (network, links) = (&in_force.loaded.network, &in_force.links);
        let undone = hosts::unprepare_stale(
            &self.host,
            network,
            links,
            &in_force.choices,
            &reserved,
            &mut self.journal,
        )
        .await;
        match undone {
            Ok(report) if !report.is_clean() => warnings.push(report.to_string()),
            Ok(_) => {}
            Err(error) => warnings.push(format!("{error:#}")),
        }
        Ok(Applied {
            file: file.display().to_string(),
            generation,
            applied_at,
            milliseconds: began.elapsed().as_millis() as u64,
            changes: made,
            warnings,
            findings,
        })
    }

    async fn attempt(
        &mut self,
        view: plan::HostView,
        loaded: &Arc<Loaded>,
    ) -> Result<(Plan, Prepared), Refusal> {
        let generation = self.shared.datapath().generation().wrapping_add(1).max(1);
        let plan = {
            let registry = self.shared.registry().clone();
            block_in_place(|| {
                let view = occupied(view, &self.ownership, self.shared.flow_tables());
                plan::plan(view, loaded, &registry, &self.ownership, generation, &self.refused)
            })?
        };
        self.state.save(&plan.registry, &plan.compiled.ownership)?;
        // A new uplink is guarded before a new guest finds a gateway here, as at the first start.
        let guards = attach_plan(&plan.choices);
        tell(&block_in_place(|| self.shared.datapath_mut().attach_guards(&guards))?);
        let prepared = hosts::prepare(
            &self.host,
            &loaded.network,
            &plan.links,
            &plan.choices,
            &plan.reserved(),
            &mut self.journal,
        )
        .await;
        let outcome = match prepared {
            Ok(prepared) => block_in_place(|| self.switch(&plan)).map(|()| prepared),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(prepared) => Ok((plan, prepared)),
            Err(error) => {
                self.take_back().await;
                if let Err(error) = block_in_place(|| self.shared.datapath_mut().detach_stale(&self.attached))
                {
                    log::warn!("taking back the guards of new uplinks: {error:#}");
                }
                Err(error.into())
            }
        }
    }

    /// New devices get their programs, guards first, which leave them alone until the policy knows them; then the flip.
    fn switch(&self, plan: &Plan) -> anyhow::Result<()> {
        let mut datapath = self.shared.datapath_mut();
        let wanted = attach_plan(&plan.choices);
        let done =
            if wanted.hooks().is_subset(&self.attached) { None } else { Some(datapath.attach(&wanted)?) };
        match datapath.install(&policy_image(plan)) {
            Ok(installed) => {
                for note in installed.notes {
                    log::warn!("{note}");
                }
                if let Some(done) = done {
                    tell(&done);
                    // The policy is in force: what is left over of an earlier one is no reason to say that it is not.
                    if let Err(error) = datapath.commit(done) {
                        log::warn!("tidying after the change of policy: {error:#}");
                    }
                }
                Ok(())
            }
            Err(error) => {
                if let Some(done) = done {
                    datapath.undo(done);
                }
                Err(error)
            }
        }
    }

    /// After a failure: the host as the policy in force wants it, and its ownership on disk.
    async fn take_back(&mut self) {
        let in_force = self.shared.in_force();
        let reserved = hosts::Ranges::new(in_force.compiled.reserved_ports.iter().copied());
        let (network, links, choices) = (&in_force.loaded.network, &in_force.links, &in_force.choices);
        let undone =
            hosts::unprepare_stale(&self.host, network, links, choices, &reserved, &mut self.journal)
                .await
                .map(drop);
        let again =
            hosts::prepare(&self.host, network, links, choices, &reserved, &mut self.journal).await.map(drop);
        let saved = self.state.save(&self.shared.registry(), &self.ownership);
        for error in [undone, again, saved].into_iter().filter_map(Result::err) {
            log::warn!("going back to the policy in force: {error:#}");
        }
    }

    fn learn_refusal(&mut self, error: &anyhow::Error, loaded: &Loaded) -> Option<String> {
        let auto = |name: &str| wants_auto(loaded, name);
        let device =
            self.shared_devices(loaded).into_iter().find(|name| names_xdp_on(error, name) && auto(name))?;
        self.refused.insert(device.clone(), format!("{:#}", error.root_cause()));
        Some(device)
    }

    fn shared_devices(&self, loaded: &Loaded) -> Vec<String> {
        let uplinks = loaded.network.uplinks.iter().map(|uplink| uplink.device.clone());
        uplinks.chain(loaded.network.interfaces.iter().map(|interface| interface.device.clone())).collect()
    }
}
