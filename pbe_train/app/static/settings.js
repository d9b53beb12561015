/** Model, guidance and where it works, steps and which of them are whole, scheduler, number of results and seed. */
const MOST_SEED = 2 ** 32;

/** A scheduler's name as people of the field say it. */
const nameOf = (scheduler) => scheduler.replace("DPMSolverMultistep", "DPM++ 2M").replace("Scheduler", "").replace("(use_karras_sigmas=True)", " Karras");

export class Settings {
  /**
   * @param {HTMLFormElement} form
   * @param {{models: object[], schedulers: string[], limits: object}} offered as the server tells of them
   */
  constructor(form, { models, schedulers, limits }) {
    this.models = models;
    for (const name of ["model", "guidance", "steps", "reuse", "scheduler", "count", "seed"]) this[name] = form.querySelector(`#${name}`);
    this.interval = ["#guided-from", "#guided-to"].map((name) => form.querySelector(name));
    this.model.append(...models.map((model) => new Option(model.name, model.id)));
    this.scheduler.append(...schedulers.map((name) => new Option(nameOf(name), name)));
    this.steps.max = limits.steps;
    this.count.max = limits.seeds;
    this.model.addEventListener("change", () => this.#takeDefaults());
    form.querySelector("#dice").addEventListener("click", () => { this.seed.value = Math.floor(Math.random() * MOST_SEED); });
    this.#takeDefaults();
  }

  /** The model that is chosen. */
  get chosen() { return this.models.find((model) => model.id === this.model.value); }

  /** What an edit asks for. Results beside one another have seeds one after the other. */
  read() {
    const first = Number(this.seed.value), count = Number(this.count.value);
    return {
      model: this.model.value,
      seeds: Array.from({ length: count }, (_, number) => (first + number) % MOST_SEED),
      guidance: Number(this.guidance.value),
      guidance_interval: this.interval.map((field) => Number(field.value)),
      steps: Number(this.steps.value),
      reuse: Number(this.reuse.value),
      scheduler: this.scheduler.value,
    };
  }

  /** What an edit asks for, for people. */
  told({ model, seeds, guidance, guidance_interval: [start, end] = [0, 1], steps, reuse = 1, scheduler }) {
    const several = seeds.length > 1 ? `seeds ${seeds[0]} to ${seeds.at(-1)}` : `seed ${seeds[0]}`;
    const where = guidance === 1 || (start === 0 && end === 1) ? "" : ` from ${start} to ${end}`;
    const whole = reuse > 1 ? `, one in ${reuse} whole` : "";
    const how = `guidance ${guidance}${where} · ${steps} steps${whole} · ${nameOf(scheduler)}`;
    const { name } = this.models.find(({ id }) => id === model) ?? { name: model };
    return `${name} · ${how} · ${several}`;
  }

  #takeDefaults() {
    const { defaults, guidance, view_size: size, buckets = [[size, size]], licence, note } = this.chosen;
    if (![...this.scheduler.options].some((option) => option.value === defaults.scheduler)) {
      this.scheduler.add(new Option(nameOf(defaults.scheduler), defaults.scheduler));
    }
    for (const name of ["guidance", "steps", "scheduler"]) this[name].value = defaults[name];
    for (const field of [this.guidance, ...this.interval]) field.disabled = !guidance;
    if (!guidance) this.guidance.value = 1;
    document.querySelector("#model-note").textContent = note;
    document.querySelector("#model-told").textContent =
      [`Paints at ${buckets.map(([wide, high]) => `${wide} × ${high}`).join(", ")} px`, licence && `licence: ${licence}`, !guidance && "takes no guidance"].filter(Boolean).join(" · ");
  }
}
